"""What the commands share: flags, exit status, errors in one line."""
