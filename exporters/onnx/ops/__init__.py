"""What graphs are built of: weights as initializers, padding moved aside, convolutions and scans."""
