"""Certificates (certify): is the global minimum of the training loss reached in phase two, and why."""
