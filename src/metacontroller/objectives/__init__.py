"""What discovery minimises."""
