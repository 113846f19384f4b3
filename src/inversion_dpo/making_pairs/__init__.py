"""`pairs build`: sample prompts, score the samples, make pairs of them."""
