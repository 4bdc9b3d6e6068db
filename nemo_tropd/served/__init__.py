"""A teacher behind OpenAI-compatible vLLM servers: token ids go there, log-probabilities come back.

client.py    HTTP: requests in flight together, each with a deadline, tried again elsewhere; the bearer token
answers.py   what is asked, and the checks of what comes back
check.py     the self-test before step 1, and the fingerprint by which another teacher is noticed
teacher.py   scores and validation for the student's ranks, in the place of teacher.sharing
engine.py    the teacher's own responses, in the place of an engine
"""
