-- What a training that draws clusters by each domain's weights will draw at the token budget, where shards are written by
-- cluster and so nothing is drawn per domain. Beyond its windows, a cluster repeats.
-- in:  rates(domain, cluster_id, expected_draws, ...), histograms(domain, cluster_id, windows, ...)
-- out: domain, cluster_id, draws, repeats
SELECT r.domain, r.cluster_id, CAST(round(r.expected_draws) AS BIGINT) AS draws,
       CAST(round(greatest(r.expected_draws - h.windows, 0.0)) AS BIGINT) AS repeats
FROM rates AS r JOIN histograms AS h ON h.domain = 'corpus' AND h.cluster_id = r.cluster_id
