"""Captures activations from PyTorch models into strapfmt datasets."""

from strapfmt_capture.accounts import CaptureReport, Estimate
from strapfmt_capture.listing import SiteInfo, SiteListing
from strapfmt_capture.live import CaptureStats
from strapfmt_capture.opening import capture
from strapfmt_capture.recorder import Recorder, create
from strapfmt_capture.session import Capture
from strapfmt_capture.sites import list_sites as sites
from strapfmt_capture.token_rows import TokenRows

__all__ = [
    "Capture",
    "CaptureReport",
    "CaptureStats",
    "Estimate",
    "Recorder",
    "SiteInfo",
    "SiteListing",
    "TokenRows",
    "capture",
    "create",
    "sites",
]
