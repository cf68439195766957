"""What the phases share: loop, optimizer, seeds, processes, progress."""
