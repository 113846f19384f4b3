"""Preference pairs: reading, checking and turning images into pixels.

Every format is read to the same rows and checked by the same rules (:mod:`.rows`). A row is kept
whole or left out whole, so winners and losers cannot come apart. Rows count from 0.
"""
