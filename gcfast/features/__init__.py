"""The features that enter the head, from anywhere: stored, memory-mapped, made anew, or collected from a model."""
