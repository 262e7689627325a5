"""A model that cannot be exported is a program of its linears, each on what reaches it when the modules run."""
