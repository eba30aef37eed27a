"""eventful_det inside other frameworks. Nothing of the package imports these; each needs its framework installed."""
