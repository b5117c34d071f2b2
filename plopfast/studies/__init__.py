"""Studies: can the scores be trusted, and do placements differ after training?"""
