"""Certificates (certify): is the global minimum of the training loss reached in phase two, and why."""

from gcfast.certificate.certificate import Assumption, Certificate, Offender
from gcfast.certificate.certification import certify

__all__ = [
    "Assumption",
    "Certificate",
    "Offender",
    "certify",
]
