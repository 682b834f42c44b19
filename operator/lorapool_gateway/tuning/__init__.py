"""OpenAI's API for files and fine-tuning jobs: uploads go to the release's store, jobs are FineTuneJob objects.

Code belongs here if it turns calls of that API into objects or answers; HTTP routes of models and errors belong in
`app`. Every call acts for one organization, which is a namespace of the key, and sees nothing of any other.
"""
