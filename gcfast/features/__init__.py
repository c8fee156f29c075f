"""The features that enter the head: stored, memory-mapped, made anew, or collected from a model."""
