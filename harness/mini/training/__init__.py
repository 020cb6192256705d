"""How the miniature learns to speak, and what says that it does. Nothing here is imported by a run.

train                                    the stages and their order: begin here
text, speech, features                   what is said, by flite's voices, as the model's parts see it
tokenizer, speakers, flow, hift, vocos   a stage each, and t3, align, export
run, captured, losses, muon, vocoder     what stages share: log and checkpoints, a step as one launch, objectives
evaluate                                 the model card's figures
distill_vocos                            a Vocos for any checkpoint, taught by the checkpoint's own vocoder
"""
