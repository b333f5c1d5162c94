"""Named metric protocols: how masks are compared with the truth, and how cases become figures."""
