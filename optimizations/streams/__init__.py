"""Speaking in pieces: tokens of utterances that are not over -> finished, watermarked pieces of their waves.

What goes through all stages while T3 still decodes, for one utterance (`streaming`) or for many that come and go
(`continuous_batching`). Begin with `pieces.py`.

    pieces.py             from new tokens to the next piece: flow, vocoder, watermark and join, of one or of several
    served.py             who is next and with whom: rounds of T3, and pieces by deadline
"""
