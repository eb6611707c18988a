"""JWT-SVIDs: signed, verified, fetched, and borne by calls."""
