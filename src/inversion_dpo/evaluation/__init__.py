"""Policy against reference: metrics with intervals, figures and one self-contained report."""
