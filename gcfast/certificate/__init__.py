"""Certificates: does the expressivity condition hold for this model and these data, and why."""

from gcfast.certificate.certificate import Assumption, Certificate, Offender
from gcfast.certificate.certification import certify

__all__ = [
    "Assumption",
    "Certificate",
    "Offender",
    "certify",
]
