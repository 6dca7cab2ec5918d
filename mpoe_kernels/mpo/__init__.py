"""The algebra of matrix product operators in plain torch."""
