-- How often each cluster occurs in the corpus and in each domain: share_c = windows_c / sum of windows.  [PE 2.4]
-- Every domain has a row for every cluster, so that an empty one is seen as such.
-- in:  counts(domain, cluster_id, windows, bytes, ...), tree(cluster_id, leaf, ...)
-- out: domain, cluster_id, windows, bytes, share
WITH totals AS (
  SELECT domain, sum(windows) AS windows FROM counts GROUP BY domain
)
SELECT totals.domain, tree.cluster_id, coalesce(counts.windows, 0) AS windows, coalesce(counts.bytes, 0) AS bytes,
       CAST(coalesce(counts.windows, 0) AS DOUBLE) / totals.windows AS share
FROM totals CROSS JOIN (SELECT cluster_id FROM tree WHERE leaf) AS tree
LEFT JOIN counts ON counts.domain = totals.domain AND counts.cluster_id = tree.cluster_id
ORDER BY totals.domain, tree.cluster_id
