"""The comparison of a pair of configs of MMEngine, for ``infobatch-mm compare``: checked, trained, reported."""
