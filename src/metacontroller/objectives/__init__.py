"""What discovery minimises: one file an objective, one interface (`objectives.base`)."""
