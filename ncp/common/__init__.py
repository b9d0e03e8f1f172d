"""Code that every program shares: config keys, errors, files, locks, processes, the hub, and judgements."""
