"""The sub-commands, a file each: options, the call, and what is printed of the result."""
