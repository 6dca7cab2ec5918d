"""Looking into an MPOE model: spectra of its bonds, routes of its tokens, parameters against experts."""
