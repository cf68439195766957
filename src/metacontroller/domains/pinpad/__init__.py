"""What the pinpad worlds share."""
