"""What each condition type and each reason of a FineTuneJob means, and what to do about it.

The reference page of the conditions is generated from these texts.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorapool_api.reasons import Explanation
from lorapool_api.tuning.states import JobCondition, JobFailure, JobReason

JOB_CONDITIONS: Mapping[JobCondition, str] = {
    JobCondition.DATA_VALID: "The data set can be read, and its lines are examples as OpenAI defines them.",
    JobCondition.ADMITTED: "A trainer has the job in memory. False: the reason says what it waits for.",
    JobCondition.PROGRESSING: "The job is being trained, evaluated or written.",
    JobCondition.EVALUATED: "The trained adapter was measured on the validation examples; the message has the losses.",
    JobCondition.PROMOTED: "The adapter is a LoraAdapter, which clients can use by its model name.",
    JobCondition.COMPLETED: "The job has ended; its state is Succeeded, Failed or Cancelled and does not change.",
}

JOB_REASONS: Mapping[JobReason, Explanation] = {
    JobReason.PENDING: Explanation("The step before has not ended yet.", "Wait; if it stays, read the operator's log."),
    JobReason.VALID: Explanation("Every line is an example, and there are enough of them."),
    JobReason.BASE_NOT_FOUND: Explanation(
        "The BaseModel in spec.baseModelRef does not exist. The job waits for it.",
        "Create the BaseModel, or delete the job: spec.baseModelRef is immutable.",
    ),
    JobReason.NOT_PERMITTED: Explanation(
        "The BaseModel is in another namespace, where it does not exist or does not list the job's. The job waits.",
        "Ask the owner of the BaseModel to add the namespace to spec.access.namespaces.",
    ),
    JobReason.TUNING_DISABLED: Explanation(
        "The BaseModel does not allow fine-tuning. The job waits.",
        "Set spec.fineTuning.enabled of the BaseModel, or ask its owner to.",
    ),
    JobReason.PROFILE_NOT_USABLE: Explanation(
        "The runtime profile for the trainer does not exist, or is not for the base's namespace. The job waits.",
        "Correct spec.fineTuning.profile of the BaseModel, or the chart's value runtimeProfiles.",
    ),
    JobReason.NO_STORE: Explanation(
        "The operator knows no store, where data and results would be. The job waits.",
        "Set the chart's value store.enabled.",
    ),
    JobReason.NAMESPACE_LIMIT: Explanation(
        "The namespace trains as many jobs as the chart's value tuning.quotas.activeJobs allows. The job waits.",
        "Wait for one of them to end, or pause or cancel one.",
    ),
    JobReason.TOKEN_QUOTA: Explanation(
        "The namespace trained as many tokens in this calendar month (UTC) as the chart's value "
        "tuning.quotas.tokensPerMonth allows. Its jobs write a checkpoint and wait.",
        "Wait for the next month, or ask the administrator to raise the value.",
    ),
    JobReason.TRAINER_STARTING: Explanation(
        "The base's trainer is being started: its pod is scheduled, or it loads the base.",
        "If it lasts, `kubectl describe job <base>-trainer` says what is missing.",
    ),
    JobReason.AWAITING_RELEASE: Explanation(
        "The trainer's Job is suspended: by the profile, or by Kueue, which releases it when there is room.",
        "With Kueue: wait, or look at its Workload. Else set spec.suspend of the Job to false.",
    ),
    JobReason.WAITING_FOR_TURN: Explanation(
        "The base trains as many jobs as spec.fineTuning.maxJobs allows. Higher priorities, then older jobs come first."
    ),
    JobReason.RETRYING: Explanation(
        "A transient failure, which status.failure has with its reason and the time of the next attempt."
    ),
    JobReason.UNREADABLE: Explanation(
        "This version of the operator cannot read the object, such as one with a field of a newer version.",
        "Correct the field that the message names, or upgrade the operator.",
    ),
    JobReason.NO_MEMORY: Explanation(
        "The trainer has no memory for one more job; the message has the figures. It starts when another one ends.",
        "Lower rank or maxTokens, spec.fineTuning.tokensPerCycle of the base, or raise the profile's memory.",
    ),
    JobReason.ADMITTED: Explanation("A trainer has the job."),
    JobReason.TRAINING: Explanation("The job is being trained."),
    JobReason.PAUSED: Explanation(
        "spec.run is Paused: a checkpoint was written, and the job uses no memory.", "Set spec.run to Run."
    ),
    JobReason.EVALUATING: Explanation("The adapter is being measured on the validation examples."),
    JobReason.PUBLISHING: Explanation("The adapter's files are being written, or its LoraAdapter is being created."),
    JobReason.EVALUATED: Explanation("The validation loss is known."),
    JobReason.NOT_EVALUATED: Explanation("The job has no validation examples, so that nothing was measured."),
    JobReason.PROMOTED: Explanation("The LoraAdapter exists. It stays when the job is deleted."),
    JobReason.PROMOTION_OFF: Explanation(
        "spec.promotion.policy is Never: the adapter's files are kept, and there is no LoraAdapter.",
        "Create a LoraAdapter with the source and digest in status.result.",
    ),
    JobReason.ENDED: Explanation("The job ended before this was reached."),
    JobReason.SUCCEEDED: Explanation("The job did all that was asked for."),
    JobReason.CANCELLED: Explanation("spec.run is Cancelled. There is no model."),
}

JOB_FAILURES: Mapping[JobFailure, Explanation] = {
    JobFailure.INVALID_DATASET: Explanation(
        "A line of the data set is not an example, or the file does not exist or is not the one that was named.",
        "Correct the line that the message names, upload the file again and create another job.",
    ),
    JobFailure.TOO_FEW_EXAMPLES: Explanation(
        "The data set has fewer than 10 examples.", "Add examples, upload the file and create another job."
    ),
    JobFailure.EXAMPLE_TOO_LONG: Explanation(
        "An example has more tokens than training.maxTokens. Examples are never cut.",
        "Shorten or split the line that the message names, or raise training.maxTokens.",
    ),
    JobFailure.TEMPLATE_UNSUPPORTED: Explanation(
        "The base's chat template cannot be trained with: a conversation's beginning is not written as the beginning "
        "of the whole, or there are tools and the template has none.",
        "Set spec.chatTemplate of the BaseModel, or use data that it can write.",
    ),
    JobFailure.INCOMPATIBLE: Explanation(
        "The job asks for a rank, a layer or an initial adapter that the base does not have or allow.",
        "Create another job within what the message names.",
    ),
    JobFailure.QUOTA_EXCEEDED: Explanation(
        "The namespace has as many unfinished jobs as the chart's value tuning.quotas.unfinishedJobs allows.",
        "Wait for some to end, or cancel some, and create the job again.",
    ),
    JobFailure.DIVERGED: Explanation(
        "Loss or gradients were not finite three steps in a row. The last finite checkpoint is kept.",
        "Lower training.learningRate or raise training.warmup, and create another job.",
    ),
    JobFailure.GATE_NOT_MET: Explanation(
        "The validation loss is not low enough for spec.promotion, so that no model was made. The files are kept.",
        "Look at the data and at the loss curve; train longer, or relax spec.promotion in another job.",
    ),
    JobFailure.POISONED: Explanation(
        "Trainers ended three times while they computed this job, the last time alone.",
        "Read the trainer's log; lower maxTokens or rank. Report it if memory was not the cause.",
    ),
    JobFailure.DEADLINE_EXCEEDED: Explanation(
        "The job did not end within spec.activeDeadline.",
        "Raise activeDeadline, or train fewer epochs, in another job.",
    ),
    JobFailure.BASE_CHANGED: Explanation(
        "The base's files are others than those with which the job began, so that its checkpoints are of no use.",
        "Pin spec.source.revision of the BaseModel, and create the job again.",
    ),
    JobFailure.NAME_TAKEN: Explanation(
        "A LoraAdapter with the name of the result exists and is not this job's.",
        "Create a LoraAdapter with the source and digest in status.result, or the job again with another "
        "output.adapterName.",
    ),
    JobFailure.SOURCE_UNAVAILABLE: Explanation(
        "The store or the data set cannot be reached. It is tried again.",
        "If it lasts, check the store's pod and the network policy.",
    ),
    JobFailure.NO_CAPACITY: Explanation(
        "No node has room for the trainer's pod; the message says what is missing. It starts when there is.",
        "Add nodes or free their resources, or correct the profile.",
    ),
    JobFailure.TRAINER_LOST: Explanation(
        "The trainer ended unexpectedly. Training continues from the last checkpoint.",
        "If it recurs, read `kubectl logs --previous` of the trainer's pod; OOMKilled: raise the profile's memory.",
    ),
    JobFailure.PREEMPTED: Explanation(
        "The trainer's pod made room for serving. Training continues from the last checkpoint once there is room.",
        "Add nodes if it recurs.",
    ),
    JobFailure.PUBLISH_FAILED: Explanation(
        "The adapter's files cannot be written or its LoraAdapter cannot be created. It is tried again.",
        "If it lasts, the message says what refuses it.",
    ),
}
