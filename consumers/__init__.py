"""Other people's software, each in an environment of its own, runs what ssmc exports: `make consumers`."""
