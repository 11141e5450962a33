# The accuracy of every stage at every depth, from the folder of an experiment to a picture. Run it there:
# python plot_results.py, or cell by cell in an editor that knows the marks # %%.

# %% Every number of the experiment: a row for each metric of each stage, at each depth
import rrcli

frame = rrcli.results(".")

# %% The accuracy of problems, a line for each stage
accuracy = frame[frame.metric == "reasoning_accuracy"]
lines = accuracy.pivot_table(index="depth", columns="stage", values="value")

# %% A picture of it, with the baseline's interval
axes = lines.plot(marker="o", xlabel="passes after pass 0", ylabel="problems answered right, %", xticks=lines.index)
baseline = accuracy[accuracy.stage == "baseline"].iloc[0]
axes.axhspan(baseline.low, baseline.high, alpha=0.2)
axes.figure.savefig("accuracy.png")
