"""The profiles that come with the package, one folder each."""
