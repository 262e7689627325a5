"""Models that cannot be exported: each linear on what reaches it when the modules run."""
