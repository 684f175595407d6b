"""Fault-tolerant K-Means: scikit-learn's estimator with checksums inside."""
