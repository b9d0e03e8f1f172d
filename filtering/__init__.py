"""The parts of filter_pickapic.py, in the order in which a row passes through them.

settings    the options
source      reads the judgements' metadata, later the columns and images of the rows needed
rules       decides which pairs to keep; pure functions
manifest    records in JSON what was read, kept and written; checks whether a folder already holds it
metadata    the columns of the pairs, without the images
copy        writes the output files, images in output order
findings    counts and samples for the report
report      report.html
"""
