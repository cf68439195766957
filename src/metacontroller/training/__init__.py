"""Training, shared by the phases: loop, optimizer, seeds, processes, progress, trackers."""
