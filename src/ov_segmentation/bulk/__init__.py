"""Many pictures at once: a folder or data set in, label maps out, shared between processes and resumed after a kill."""
