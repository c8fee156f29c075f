"""The features that enter the head: stored, memory-mapped, made anew, or collected from a model."""

from gcfast.features.cache import FeatureCache
from gcfast.features.checks import checked
from gcfast.features.collection import TrainingSet, check_new_head, collect, copies_among, streams
from gcfast.features.duplicates import equal_rows, equal_samples
from gcfast.features.loader import Source, source_of
from gcfast.features.matrix import Features, StoredFeatures
from gcfast.features.reading import as_targets
from gcfast.features.second_reading import second_reading_seconds
from gcfast.features.stacked_ones import PANEL, FeaturesWithOnes
from gcfast.features.wide import WideFeatures

__all__ = [
    "PANEL",
    "FeatureCache",
    "Features",
    "FeaturesWithOnes",
    "Source",
    "StoredFeatures",
    "TrainingSet",
    "WideFeatures",
    "as_targets",
    "check_new_head",
    "checked",
    "collect",
    "copies_among",
    "equal_rows",
    "equal_samples",
    "second_reading_seconds",
    "source_of",
    "streams",
]
