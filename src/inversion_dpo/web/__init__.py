"""The page: label pairs, compare reference and policy, follow a run; on this machine only."""
