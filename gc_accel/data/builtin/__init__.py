"""The built-in data sets, made of scikit-learn's scans of handwriting: no download."""
