"""The methods: what can be removed from a layer, how it is judged, and what makes up for it."""
