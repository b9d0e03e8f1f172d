"""The parts of prepare_preferences.py, in the order in which a row passes through them.

settings    the options
source      reads rows of parquet, JSON and CSV files in order
formats     converts a row to judgements of two images; pure functions, one per format
write       the images' bytes, Pick-a-Pic's columns, the output files
manifest    records in JSON what was read and written, and the progress of an interrupted run
"""
