"""The small faults that ``mutants.py`` tries, by the file below ``infobatch_mm/`` that each is put into.

A fault is its name, the tests to run before those of its room (the likeliest to fail), the text that it replaces, which
occurs once in the file, and what takes its place. When the package changes, adapt what no longer applies.
"""

from __future__ import annotations

#: Folders below ``tests/`` whose tests a fault in a room of the package must fail.
ROOMS = {
    "core": "test_core",
    "policies": "test_policies test_core test_loop",
    "scores": "test_scores test_core test_loop",
    "loop": "test_loop",
    "accelerated": "test_diffusion",
    "diffusion": "test_diffusion",
    "engine": "test_engine",
    "losses": "test_losses",
    "report": "test_report",
    "forecast": "test_forecast",
}

#: Tests that many faults of a room are likely to fail.
CHEAP = (
    "test_core/test_plan.py "
    "test_core/test_policies.py "
    "test_core/test_schedule.py "
    "test_core/test_pruner.py "
    "test_core/test_scores.py "
    "test_core/test_blanks.py "
    "test_core/test_noise_levels.py"
)
PASSES = (
    CHEAP + " test_loop/test_infobatch.py::test_what_was_skipped_before_a_checkpoint_is_booked_after_it "
    "test_engine/test_passes.py"
)
FAMILIES = (
    "test_policies/test_contract.py "
    "test_core/test_policies.py "
    "test_core/test_plan.py "
    "test_core/test_pruner.py "
    "test_loop/test_infobatch.py::test_long_trainings_agree_with_the_twin"
)
DRAWS = "test_core/test_systematic.py test_policies/test_contract.py"
WORTH = "test_core/test_worth.py test_core/test_forecast_holds.py"
TARGETS = "test_policies test_engine/test_variance.py test_core/test_annealed.py"
NORMS = "test_loop/test_gradient.py test_losses/test_gradient_scores.py test_diffusion/test_gradient.py"
STATISTICS = "test_core/test_recalibration.py test_engine/test_recalibration.py"
SCORES = "test_scores/test_contract.py test_core/test_scores.py test_core/test_noise_levels.py test_core/test_pruner.py"
LOOP = "test_loop/test_infobatch.py test_loop/test_scheduler.py test_loop/test_users.py test_loop/test_misbehaving.py"
SCRIPT = (
    "test_diffusion/test_accelerated.py test_diffusion/test_max_train_steps.py test_diffusion/test_what_scripts_see.py"
)

# fmt: off
FAULTS: dict[str, list[tuple[str, str, str, str]]] = {
    "core/plan.py": [
        ("weight-not-rescaled", CHEAP, "num_candidates / num_kept)", "1.0)"),
        ("sorted-plan-keeps-weights-in-place", CHEAP, "weights=self.weights[order])", "weights=self.weights)"),
        ("pairs-as-if-drawn-with-replacement",
         "test_losses/test_pair_weights.py " + CHEAP,
         "return (len(self) - 1) / (population - 1), level, without_replacement",
         "return (len(self) - 1) / (population - 1), level, 1.0"),
    ],
    "core/chances.py": [
        ("kept-count-takes-the-smallest", CHEAP, "key=lambda k: abs(k - target)", "key=lambda k: k"),
        ("weights-of-the-chances-asked-for", DRAWS, "ONE / units[places] if", "1 / found[places] if"),
        ("certain-samples-drawn-too", DRAWS, "np.flatnonzero(chances >= 1.0), np.flatnonzero((chances < 1.0)",
         "np.flatnonzero(chances > 1.0), np.flatnonzero((chances <= 1.0)"),
        ("ties-by-the-last-digit", DRAWS, "round(abs(k - total), 6)", "-round(abs(k - total), 6)"),
    ],
    "core/systematic.py": [
        ("start-is-left-out", DRAWS, "ends += ONE - 1 - start", "ends += ONE - 1"),
        ("one-order-for-all", DRAWS, "ends = units[order]", "ends = units.copy()"),
        ("nothing-for-size-zero", DRAWS, "total >= number + lowest * (count - number)", "total > count"),
        ("factor-without-bounds", DRAWS, "free = (chances > lowest) & (chances < 1.0)", "free = chances > -1"),
    ],
    "core/worth.py": [
        ("worth-of-plain-norms", DRAWS, "squares = np.square(norms, dtype=np.float64)", "squares = np.asarray(norms)"),
        ("length-is-worth", WORTH, "worth.cost * (1 + noise) / (1 + noise / worth.efficiency)",
         "worth.cost * worth.efficiency"),
        ("length-is-cost", WORTH, "worth.cost * (1 + noise) / (1 + noise / worth.efficiency)", "worth.cost"),
        ("many-samples-by-a-stride", WORTH, "np.sort(np.random.default_rng(length).integers(0, length, _ENOUGH))",
         "np.arange(0, length, length // _ENOUGH)"),
        ("unseen-samples-of-no-size", WORTH, "np.where(seen, norms, norms.mean(where=seen, dtype=np.float64))",
         "np.where(seen, norms, 0.0)"),
        ("cost-asked-for", WORTH, "return Worth(cost, None if", "return Worth(self.cost, None if"),
    ],
    "core/annealed.py": [
        ("annealing-one-pass-late", CHEAP, "progress < self.delta - 1e-9", "progress <= self.delta + 1e-9"),
        ("target-forgets-what-was-saved", TARGETS, "self.target_saving - snapshot.saved", "self.target_saving"),
        ("worth-not-asked", TARGETS, "worth(norms, found.by_sample()) >= least", "True"),
    ],
    "core/sample_norms.py": [
        ("norm-times-weight", NORMS, "norms = self._squares.sqrt() / self._factors", "norms = self._squares.sqrt()"),
        ("loss-scale-kept", NORMS, "return gradient / self._upstream", "return gradient"),
        ("half-precision-divided-as-it-is", NORMS, "if gradient.dtype == torch.float16:\n            gradient =",
         "if False:\n            gradient ="),
        ("every-backward-pass-adds-up", NORMS, "if self._come >= self._watched:", "if False:"),
        ("bias-left-out", NORMS, "* (_sum_of_squares(inputs) + (layer.bias is not None))", "* _sum_of_squares(inputs)"),
        ("kernel-seen-in-one-place", NORMS, "        parts.append(part)\n", "        parts = [part]\n"),
        ("overflow-taken-for-a-norm", NORMS, "torch.where(both - both == 0, norms, self._norms)", "norms"),
    ],
    "core/last_layer.py": [
        ("the-last-call-is-taken", NORMS, "if len(fitting) != 1 or self._proofs < _PROOFS:", "if False:"),
        ("softmax-passes-for-outputs", NORMS, "if not fits or not comes_from(losses, outputs):", "if not fits:"),
    ],
    "core/recalibration.py": [
        ("momentum-not-put-back", STATISTICS, "            each.momentum = momentum\n", ""),
        ("generators-not-put-back", STATISTICS, "        rng.restore(generators)\n", ""),
        ("statistics-of-unseen-layers-lost", STATISTICS, "                each.running_mean.copy_(mean)\n", ""),
        ("processes-not-averaged", STATISTICS, "each.copy_(part.view_as(each))", "pass"),
    ],
    "core/schedule.py": [
        ("last-partial-pass-dropped", CHEAP,
         "math.ceil(self.total_samples / num_samples)", "max(1, self.total_samples // num_samples)"),
        ("steps-one-ahead",
         "test_engine/test_schedule.py::test_steps_are_spread_evenly_within_a_pass "
         "test_engine/test_mmpretrain_schedules.py",
         "before + (after - before) * done // batches", "before - (before - after) * done // batches"),
        ("iterations-steps-before-rounded-up", CHEAP,
         "return self.start(pass_index) // self.batch_size", "return -(-self.start(pass_index) // self.batch_size)"),
        ("full-visits-beyond-the-end", CHEAP,
         "last * count(0) + count(last) + beyond * count(self.num_passes)",
         "(last + 1) * count(0) + beyond * count(self.num_passes)"),
    ],
    "core/pruner.py": [
        ("every-pass-the-same-draw",
         PASSES,
         "rng.generator(self.seed, self.pass_index)", "rng.generator(self.seed, 0)"),
        ("shuffle-off-is-shuffled",
         PASSES,
         "self._set_plan(plan if self.shuffle else plan.sorted())", "self._set_plan(plan)"),
        ("start-rounded-down",
         PASSES,
         "(2 * visits * done + batch * of) // (2 * batch * of)", "(visits * done) // (batch * of)"),
    ],
    "core/training.py": [
        ("resume-forgets-skipped",
         PASSES,
         "parsed.visited, parsed.skipped, {}", "parsed.visited, 0, {}"),
        ("resume-forgets-seed",
         PASSES,
         "self.seed, self.pass_index = parsed.seed, parsed.pass_index", "self.pass_index = parsed.pass_index"),
    ],
    "core/state.py": [
        ("other-names-not-refused", CHEAP, "if state.fingerprint != training.fingerprint:", "if False:"),
        ("other-settings-not-refused", CHEAP, "if state.settings != here:", "if False:"),
    ],
    "core/store.py": [
        ("visit-without-a-valid-pixel-recorded",
         "test_core/test_scores.py test_core/test_blanks.py test_losses/test_blank_factor.py "
         "test_core/test_pruner.py",
         "usable = real & valid & finite", "usable = real & finite"),
        ("merge-records-own-twice", "test_core/test_distributed.py",
         "self._take_back(self._unmerged.pop())", "self._unmerged.pop()"),
        ("merge-in-another-rank-order", "test_core/test_distributed.py test_core/test_many_processes.py",
         "in zip(gathered_indices, gathered_losses, strict=True):",
         "in zip(gathered_indices[::-1], gathered_losses[::-1], strict=True):"),
        ("resume-forgets-times-seen",
         "test_core/test_scores.py test_core/test_blanks.py test_losses/test_blank_factor.py "
         "test_core/test_pruner.py",
         'self.times_seen.copy_(state["times_seen"])', "pass"),
        ("seen-samples-count-as-blank",
         "test_core/test_scores.py test_core/test_blanks.py test_losses/test_blank_factor.py "
         "test_core/test_pruner.py",
         "blank = self.unusable.blank & ~self.seen", "blank = self.unusable.blank"),
    ],
    "core/unusable.py": [
        ("unusable-visits-counted-twice", "test_core/test_distributed.py test_core/test_many_processes.py",
         "self._count(own, -1)", "pass"),
    ],
    "core/books.py": [
        ("skipped-visits-count-as-kept",
         CHEAP + " test_loop/test_infobatch.py",
         "kept = visited - self.skipped", "kept = visited"),
        ("skipped-visits-count-as-saved",
         CHEAP + " test_loop/test_infobatch.py",
         "handed_out = self.visits + self.visits_skipped", "handed_out = self.visits"),
        ("own-skipped-told-twice", "test_loop/test_two_ranks.py",
         "self.own_skipped, self._corrections = 0, {}", "self._corrections = {}"),
    ],
    "core/score_file.py": [
        ("scores-written-in-place",
         "test_core/test_score_file.py "
         "test_engine/test_faults.py::test_a_full_disk_for_summary_or_scores_is_a_warning",
         'path.with_name(f"infobatch_scores.tmp{path.suffix}")', "path"),
    ],
    "core/blanks.py": [
        ("blank-factor-upside-down", "test_core/test_blanks.py",
         "_share(num_samples, num_blank, batch) / _share(visits, blank_visits, batch)",
         "_share(visits, blank_visits, batch) / _share(num_samples, num_blank, batch)"),
    ],
    "core/sampler.py": [
        ("resumed-share-begins-too-late",
         "test_core/test_pruner.py test_core/test_item_seed.py "
         "test_engine/test_ranks.py::test_resumed_on_other_ranks_visits_the_rest_of_the_plan",
         "return self.pruner.visited // self.world", "return self.pruner.visited"),
        ("ranks-share-item-seeds",
         "test_core/test_item_seed.py test_engine/test_ranks.py::test_ranks_together_train_as_one",
         "own_position * self.world + self.rank)", "own_position)"),
    ],
    "core/rng.py": [
        ("numpy-not-restored", "test_core/test_item_seed.py", "np.random.set_state(legacy)", "pass"),
    ],
    "core/collate.py": [
        ("collate-proven-once-only", "test_core/test_collate.py",
         "return self._seen & (self._seen - 1) == 0", "return self._seen == 1"),
    ],
    "core/loader.py": [
        ("filling-visit-of-the-next-sample",
         "test_core/test_collate.py::test_padding_is_read_as_the_sample_that_it_repeats "
         "test_core/test_distributed.py",
         "return int(index if index >= 0 else -1 - index)", "return int(index if index >= 0 else -index)"),
    ],
    "core/distributed.py": [
        ("differing-processes-not-refused",
         "test_engine/test_bad_input.py "
         "test_core/test_torch_ddp.py::test_processes_that_disagree_are_all_told_both_values",
         "if theirs[name] != value:", "if False:"),
    ],
    "policies/auto.py": [
        ("bar-not-asked", WORTH, "limit(norms) < self.bar", "False"),
        ("bar-the-wrong-way", WORTH, "if limit >= self.bar:", "if limit < self.bar:"),
    ],
    "policies/infobatch.py": [
        ("mean-itself-is-well-learned", FAMILIES, "(scores < threshold) & seen", "(scores <= threshold) & seen"),
        ("unseen-are-well-learned", FAMILIES, "(scores < threshold) & seen", "(scores < threshold)"),
        ("quantile-rounded-down", FAMILIES,
         "count = round(quantile * len(where))", "count = int(quantile * len(where))"),
    ],
    "policies/random.py": [
        ("random-spares-unseen", FAMILIES,
         "Thinning(torch.ones_like(snapshot.seen), ratio)", "Thinning(snapshot.seen, ratio)"),
    ],
    "report/statistics.py": [
        ("interval-of-one-side", "test_report", "(1 + level) / 2, count - 1", "level, count - 1"),
        ("degrees-of-freedom", "test_report", "(1 + level) / 2, count - 1", "(1 + level) / 2, count"),
        ("one-arm-among-many", "test_report", "return 1 - _ERROR / num_arms", "return 1 - _ERROR"),
        ("rounding-is-spread", "test_report", "spread <= _ROUNDING * max(scale, *map(abs, differences))",
         "spread == 0"),
    ],
    "report/verdicts.py": [
        ("lossless-by-the-better-end", "test_report", "if gain.low > -margin:", "if gain.high > -margin:"),
        ("higher-is-better-always", "test_report", "gain = interval.negated() if lower_is_better else interval",
         "gain = interval"),
        ("easier-controls-are-fair", "test_report", "if fewest is not None and not is_worse",
         "if False and not is_worse"),
    ],
    "forecast/estimates.py": [
        ("own-visits-count-as-pairs", "test_forecast", "(square_of_sum - repeats @ squares)", "square_of_sum"),
        ("limit-by-one-visit", "test_forecast", "same = _means(norms[:, 0] * norms[:, 1], counts)",
         "same = _means(norms[:, 0] ** 2, counts)"),
        ("noise-of-all-visits", "test_forecast", "/ 4\n    exact", "\n    exact"),
    ],
    "forecast/calibration.py": [
        ("a-curve-that-knows-its-sample", "test_forecast", "others = fold != place", "others = fold > -1"),
    ],
    "scores/ema.py": [
        ("ema-without-its-correction", SCORES, "(1 - decay) / (1 - decay ** times[at])", "(1 - decay) + 0 * times[at]"),
    ],
    "scores/raw.py": [
        ("raw-counts-repeated-visits-once", SCORES,
         "np.add.at(columns.times_seen.numpy(), where, 1)", "columns.times_seen.numpy()[where] += 1"),
    ],
    "scores/noise_levels.py": [
        ("noise-levels-never-decay", SCORES, "self._sums *= _DECAY", "pass"),
        ("shares-not-brought-to-1", SCORES, "shares /= shares.mean()", "pass"),
    ],
    "scores/timestep.py": [
        ("resume-forgets-noise-levels", SCORES, 'self._levels.load_state_dict(state["noise_levels"])', "pass"),
    ],
    "loop/passes.py": [
        ("dropped-tail-never-ends", LOOP, "elif last.touched or last.has_nothing_to_weigh:", "elif last.touched:"),
        ("score-recorded-twice", LOOP, "if not fresh.all():", "if False:"),
        ("skipped-told-twice", "test_loop/test_two_ranks.py", "self._skipped_before -= told", "pass"),
        ("ranks-in-different-passes-not-refused",
         "test_loop/test_two_ranks.py::test_ranks_that_end_different_passes_are_both_told",
         "if len(set(passes)) > 1:", "if False:"),
    ],
    "loop/walk.py": [
        ("filling-visit-counts", "test_core/test_distributed.py test_loop/test_two_ranks.py",
         "len(self._own) - (missing > 0 and rank >= world - missing)", "len(self._own)"),
        ("drop-last-counts", LOOP, "(left % batch if batch and drop_last else 0)", "0"),
        ("resume-repeats-the-batch", LOOP,
         "done = -(-done // self.batch) * self.batch", "done = max(0, done - 1) // self.batch * self.batch"),
        ("tail-not-scaled", "test_core/test_distributed.py",
         "return slots / (slots - self._padding * looks).to(torch.float32)",
         "return slots / (slots - 0 * looks).to(torch.float32)"),
        ("not-handed-out-not-refused", "test_engine/test_bad_input.py",
         "if self.batch is not None and (status == _PLANNED).any():", "if False:"),
    ],
    "loop/scheduler.py": [
        ("partial-updates-dropped", "test_loop/test_scheduler.py",
         "return -(-batches // self._every) if self._partial else batches // self._every",
         "return batches // self._every"),
        ("skipped-steps-not-made-up-for", "test_loop/test_scheduler.py",
         "if pass_index > self.scheduler.last_epoch:", "if False:"),
    ],
    "loop/infobatch.py": [
        ("logged-loss-is-the-plain-mean",
         "test_loop/test_users.py " + LOOP,
         "self._last = weights if walk.plan.pruned or isinstance(scale, Tensor) else None, taken",
         "self._last = None, taken"),
    ],
    "accelerated/walk.py": [
        ("score-recorded-twice", SCRIPT, "batch.is_weighed = True", "pass"),
        ("skipped-not-counted", SCRIPT, "self._training.own_skipped += len(batch.index)", "pass"),
        ("idle-walk-counts", SCRIPT, "training.visited, training.own_skipped = start, 0", "training.own_skipped = 0"),
    ],
    "accelerated/updates.py": [
        ("partial-updates-dropped", SCRIPT,
         "math.ceil(math.ceil(visits / batch_size) / accumulated)", "math.ceil(visits / batch_size) // accumulated"),
    ],
    "accelerated/scheduler.py": [
        ("scheduler-handed-over-midway", SCRIPT,
         "missing = self._begin + self._steps_due() - scheduler.last_epoch",
         "missing = self._steps_due() - scheduler.last_epoch"),
    ],
    "accelerated/infobatch.py": [
        ("steps-of-one-process", "test_diffusion/test_accelerated_distributed.py",
         "return due * self._per_update", "return due"),
    ],
    "accelerated/batch.py": [
        ("ranked-by-losses", SCRIPT,
         'torch.where(torch.isfinite(losses), scores, float("nan"))',
         'torch.where(torch.isfinite(losses), losses, float("nan"))'),
    ],
    "accelerated/standing.py": [
        ("resume-forgets-updates", SCRIPT, 'self._walk.updates_done = int(state["updates"])', "pass"),
    ],
    "accelerated/checkpoints.py": [
        ("half-loaded-before-refused", SCRIPT, "self._check_state(state)", "pass"),
    ],
    "accelerated/loader.py": [
        ("ragged-end-meets", "test_diffusion/test_accelerated_distributed.py",
         "self.ragged = has_tail and not dispatched and not accelerator.even_batches", "self.ragged = False"),
        ("generator-not-restored", SCRIPT, "base.generator = own\n", "pass\n"),
    ],
    "engine/takeover.py": [
        ("resumed-by-hand-begins-anew", "test_engine/test_configs_of_users.py::test_resuming_a_runner_by_hand",
         "pruned._iter, pruned._epoch = loop.iter, loop.epoch", "pass"),
        ("watched-epoch-never-ends",
         "test_engine/test_configs_of_users.py test_engine/test_console.py test_engine/test_parity.py",
         "return left if later == 0 else 0", "return 0"),
    ],
    "engine/checkpoints.py": [
        ("checkpoint-written-in-place",
         "test_engine/test_checkpoints.py::test_the_checkpoints_before_stay_until_the_next_are_written "
         "test_engine/test_faults.py::test_killed_while_saving_a_run_that_keeps_one_checkpoint_still_has_one",
         '_UNFINISHED = ".unfinished"', '_UNFINISHED = ""'),
        ("new-checkpoint-removed",
         "test_engine/test_checkpoints.py::test_resume_beside_save_best_and_max_keep_ckpts_is_exact "
         "test_engine/test_checkpoints.py",
         "late.remove_except({hook.last_ckpt, *_best_checkpoints(hook)})", "late.remove_except(set())"),
    ],
    "engine/param_schedule.py": [
        ("schedulers-not-given-back", "test_engine/test_passes.py::test_restores_the_host_afterwards",
         "del hook.after_train_iter", "pass"),
        ("remainder-of-accumulation-forgotten",
         "test_engine/test_host_hooks.py::test_gradient_accumulation_loses_no_gradient",
         "single._remainder_counts = max_iters % single._accumulative_counts", "pass"),
    ],
    "engine/wiring.py": [
        ("views-not-given-back", "test_engine/test_passes.py::test_restores_the_host_afterwards",
         "undo.callback(views.restore)", "pass"),
    ],
    "engine/process_state.py": [
        ("validation-draws", "test_engine/test_resume.py::test_a_validation_after_the_checkpoint_leaves_no_trace",
         "rng.restore(self.generators)", "pass"),
        ("resume-forgets-inner-counts",
         "test_engine/test_faults.py::test_a_run_killed_at_random_moments_goes_on_exactly "
         "test_engine/test_configs_of_users.py::test_optimiser_wrapper_dicts_and_scheduler_dicts",
         "wrapper._inner_count = count", "pass"),
        ("resume-forgets-buffers",
         "test_engine/test_ranks.py::test_buffers_of_every_rank_and_the_choice_of_rank_0_are_resumed",
         "buffers[name].copy_(buffer)", "pass"),
    ],
    "engine/run.py": [
        ("visits-of-one-process", "test_engine/test_ranks.py::test_ranks_together_train_as_one",
         "self.training.advance(len(self.batch.indices) * runner.world_size)",
         "self.training.advance(len(self.batch.indices))"),
        ("skipped-not-counted", "test_engine/test_misbehaving_runs.py",
         "self.training.own_skipped += len(indices)", "pass"),
        ("replaced-samples-recorded",
         "test_engine/test_passes.py::test_a_replaced_sample_is_not_recorded_under_the_wrong_index",
         "valid = valid & ~moved(replaced, valid.device) if bool(replaced.any()) else valid", "pass"),
        ("resume-forgets-steps-taken", "test_engine/test_resume.py::test_resumed_run_visits_the_same_samples",
         "self._pacer.taken = steps", "pass"),
    ],
    "engine/hook.py": [
        ("resume-forgets-wall-time", "test_engine/test_console.py test_engine/test_resume.py",
         'self._books.time_before = float(state["wall_time_s"])', "pass"),
    ],
    "engine/resume.py": [
        ("other-repeats-not-refused",
         "test_engine/test_bad_input.py::test_bad_input_is_refused_with_the_documented_message",
         "if saved != num_repeats:", "if False:"),
    ],
    "engine/loops.py": [
        ("last-validation-left-out",
         "test_engine/test_configs_of_users.py::test_the_last_iteration_is_validated_wherever_validation_begins",
         "return self.val_begin <= self.pruner.schedule.total_steps",
         "return self._iter >= self.val_begin and self._iter % self.val_interval == 0"),
    ],
    "engine/samplers.py": [
        ("contradicting-settings-not-refused",
         "test_engine/test_policies_in_configs.py test_engine/test_bad_input.py",
         "if settings.get(key) not in (None, value):", "if False:"),
    ],
    "losses/reduction.py": [
        ("sum-taken-as-mean", "test_losses/test_reduction.py",
         'return 1 if self._known.get(path, self._said) == "sum" else size', "return size"),
    ],
    "losses/weigher.py": [
        ("objective-not-weighted", "test_losses/test_weigher.py test_losses/test_views.py",
         "return (per_sample * rows.weights_on(per_sample.device)).sum() / normaliser",
         "return per_sample.sum() / normaliser"),
        ("gradient-without-blank-factor", "test_losses/test_blank_factor.py",
         "return values if factor == 1 else values * factor", "return values"),
    ],
    "losses/tally.py": [
        ("rows-add-up-to-a-score",
         "test_losses/test_weigher.py test_losses/test_views.py test_losses/test_mmpretrain_heads.py",
         "self.add(added(scores) / numbers, numbers > 0)", "self.add(added(scores), numbers > 0)"),
        ("valid-in-all-terms",
         "test_losses/test_weigher.py test_losses/test_views.py test_losses/test_nothing_valid.py "
         "test_losses/test_mmseg_heads.py",
         "self.scored = scores + mean_loss, any_valid | valid", "self.scored = scores + mean_loss, any_valid & valid"),
        ("mixed-scores-not-divided", "test_losses/test_mmpretrain_mixing.py",
         "return parts.sum(0) / total, total > 0", "return parts.sum(0), total > 0"),
    ],
    "losses/logged.py": [
        ("logged-value-upside-down", "test_losses/test_logged_values.py",
         "host_loss * (weighted / plain)", "host_loss * (plain / weighted)"),
    ],
    "losses/sound.py": [
        ("valid-sample-quarantined",
         "test_losses/test_universal_path.py test_losses/test_bad_heads.py test_losses/test_nothing_valid.py "
         "test_losses/test_mmdet.py",
         "return (own <= _SOUND * whole) | moved(valid, own.device)", "return own <= _SOUND * whole"),
    ],
    "losses/dissect/coverage.py": [
        ("unweighed-loss-not-refused", "test_losses/test_bad_heads.py test_losses/test_broken_losses.py",
         "if parameter is not None:", "if False:"),
    ],
    "losses/dissect/memory.py": [
        ("buffers-not-restored", "test_losses/test_universal_path.py test_losses/test_bad_heads.py",
         "                part._buffers[name] = original", "                pass"),
    ],
    "losses/dissect/proof.py": [
        ("reordering-not-refused", "test_losses/test_bad_heads.py test_losses/test_broken_losses.py",
         "if one is None or other is None or not _equal(one, other, tolerance):", "if False:"),
    ],
    "losses/mixing.py": [
        ("proof-of-mixing-draws", "test_losses/test_mmpretrain_mixing.py", "rng.restore(generators)", "pass"),
    ],
    "losses/batch_in_hand.py": [
        ("unlabelled-samples-recorded", "test_losses/test_mmpretrain_heads.py test_losses/test_nothing_valid.py",
         "valid = valid & moved(self.labelled, valid.device)", "pass"),
    ],
    "diffusion/denoising.py": [
        ("every-pass-the-same-noise", "test_diffusion/test_denoising.py",
         "rng.generator(seed, pass_index, int(index), repeat)", "rng.generator(seed, int(index), repeat)"),
        ("min-snr-of-velocities", "test_diffusion/test_denoising.py",
         '"v_prediction": snr + 1,', '"v_prediction": snr,'),
        ("flow-matching-snr-halved", "test_diffusion/test_denoising.py", "return 2 * torch.log(", "return torch.log("),
        ("one-part-of-the-schedule", "test_diffusion/test_denoising.py",
         "return (timesteps + part * num_timesteps) // parts", "return timesteps // parts"),
    ],
    "diffusion/latents.py": [
        ("description-written-in-place", "test_diffusion/test_latents.py",
         'unnamed = folder / f"{_ABOUT}.partial"', "unnamed = folder / _ABOUT"),
        ("encoding-draws", "test_diffusion/test_latents.py", "own = torch.Generator()", "own = None"),
        ("two-runs-encode-at-once", "test_diffusion/test_latents.py",
         "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)"),
    ],
    "diffusion/first_stage.py": [
        ("spread-not-scaled", "test_diffusion/test_first_stage.py test_diffusion/test_latents.py",
         "encoded.latent_dist.std * scale", "encoded.latent_dist.std"),
    ],
}
# fmt: on
