"""Certificates: does the expressivity condition hold for this model and these data, and why."""
