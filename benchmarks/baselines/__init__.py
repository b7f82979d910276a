"""The neighbours, restated in the form of their papers and published code: what this library is measured against."""
