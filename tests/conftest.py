"""Laws are judged by what they find, never by how long an example takes on a busy machine."""

from contextlib import suppress

# Tests that need a GPU run where hypothesis may be missing.
with suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("patient", parent=settings(), deadline=None)
    settings.load_profile("patient")
