"""What every program shares: keys, errors, files, locks, processes, the hub, and what a judgement says."""
