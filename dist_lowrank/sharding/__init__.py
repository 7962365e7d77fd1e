"""Layouts of matrices over ranks, and the rounds of sums between them."""
