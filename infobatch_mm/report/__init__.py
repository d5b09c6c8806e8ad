"""What finished runs are worth: their numbers read, set side by side, drawn.

Reads what runs left on disk, and knows neither their hosts nor how they were started. Tables need rich and figures
matplotlib (the extra ``report``), each imported by the file that needs it.
"""
