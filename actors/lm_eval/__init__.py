"""EleutherAI's lm-evaluation-harness for models that take their mistakes back: `python -m actors.lm_eval --model retract ...`.

model.py is the model class, problems.py and the yamls beside it are tasks with this house's prompts and judges. Nothing else here
needs the harness, which is installed by itself (extra `lm-eval`).
"""
