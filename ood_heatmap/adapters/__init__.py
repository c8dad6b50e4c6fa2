"""Other tools' interfaces to the detector and its training; each module is one optional extra."""
