"""What prepare_preferences.py is made of, in the order in which a row passes it.

settings    the options
source      reads rows of parquet, JSON and CSV files one after the other
formats     turns a row into judgements of two images; pure, a function per format
write       the images' bytes, Pick-a-Pic's columns, the output files
manifest    says in JSON what was read and written, and how far an interrupted run came
"""
