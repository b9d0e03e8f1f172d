"""What filter_pickapic.py is made of, in the order in which a row passes it.

settings    the options
source      reads the judgements' metadata, later the columns and images of rows that are needed
rules       decides which pairs to keep; pure
manifest    says in JSON what was read, kept and written, and whether a folder holds it already
metadata    the columns of the pairs, but for the images
copy        writes the output files, images in output order
findings    what the report says and shows
report      report.html
"""
